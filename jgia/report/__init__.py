"""Reports: the documented result, and its page, picture, arrays and terminal summary."""

from jgia.report.console import print_summary as print_summary
from jgia.report.figures import grid_png as grid_png
from jgia.report.html import render_html as render_html
from jgia.report.records import HEADLINE_DB as HEADLINE_DB
from jgia.report.records import THRESHOLDS as THRESHOLDS
from jgia.report.records import Result as Result
from jgia.report.schema import SCHEMA_VERSION as SCHEMA_VERSION
from jgia.report.schema import in_schema_order as in_schema_order
from jgia.report.schema import validate_result as validate_result
from jgia.report.search import SearchHistory as SearchHistory
from jgia.report.write import to_json as to_json
from jgia.report.write import write_report as write_report
