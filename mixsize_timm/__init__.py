"""Train timm models at mixed image sizes."""
from .calibration import calibrate
from .data import create_loader
from .regime import Regime
from .smoothing import GradientSmoother

from ._version import __version__

__all__ = ['GradientSmoother', 'Regime', 'calibrate', 'create_loader']
