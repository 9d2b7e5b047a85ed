"""`python -m cdpo.report DIRECTORY`, as cdpo-report."""

from cdpo.report import main

main()
