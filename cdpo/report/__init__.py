"""Runs to tables and figures: cdpo-report."""
