"""Train timm models at mixed image sizes."""
from ._version import __version__
from .calibration import calibrate
from .data import create_loader
from .regime import Regime
from .smoothing import GradientSmoother

__all__ = ['GradientSmoother', 'Regime', '__version__', 'calibrate', 'create_loader']
