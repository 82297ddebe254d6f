"""Train timm models at mixed image sizes."""
from ._version import __version__
from .bn_stats import model_at
from .calibration import calibrate
from .data import create_loader
from .models import load
from .regime import Regime
from .smoothing import GradientSmoother

__all__ = ['GradientSmoother', 'Regime', '__version__', 'calibrate', 'create_loader', 'load',
           'model_at']
