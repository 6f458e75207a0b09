"""Self-contained HTML pages: what a person looks at after a comparison, an evaluation or a sweep."""

from tread_composer.report.chart import Chart, Curve
from tread_composer.report.evaluation import evaluation_page
from tread_composer.report.page import Report

__all__ = ['Chart', 'Curve', 'Report', 'evaluation_page']
