"""Compare the gradients of several estimators on the same rollouts with exact targets: the command `measure`."""

from lit_opd.lab.measure.experiment import measure
from lit_opd.lab.measure.result import Measurement, Row
from lit_opd.lab.measure.show import print_measurement, record

__all__ = ["Measurement", "Row", "measure", "print_measurement", "record"]
