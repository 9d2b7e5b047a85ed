"""`python -m cdpo.report DIRECTORY`, as cdpo-report."""

from cdpo.report.write import main

main()
