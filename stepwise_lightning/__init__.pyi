from .callbacks.collapse_monitor import CollapseMonitor as CollapseMonitor
from .callbacks.collapse_monitor import CollapseWatch as CollapseWatch
from .callbacks.forecast_logger import ForecastLogger as ForecastLogger
from .callbacks.online_evaluation import OnlineKNN as OnlineKNN
from .callbacks.online_evaluation import OnlineLinearProbe as OnlineLinearProbe
from .callbacks.spectrum_logger import SpectrumLogger as SpectrumLogger
from .data import FixedCropPairs as FixedCropPairs
from .data import TwoViewDataModule as TwoViewDataModule
from .encoders import MLP as MLP
from .encoders import Encoder as Encoder
from .encoders import LinearEncoder as LinearEncoder
from .encoders import Projector as Projector
from .encoders import ResNet as ResNet
from .encoders import scale_last_layer as scale_last_layer
from .forecasts.diagnose import diagnose as diagnose
from .forecasts.diagnosis import Diagnosis as Diagnosis
from .forecasts.forecast import Forecast as Forecast
from .forecasts.simulate import forecast as forecast
from .loss_checks import LossReport as LossReport
from .loss_checks import check_loss as check_loss
from .losses import barlow_twins_loss as barlow_twins_loss
from .losses import simclr_loss as simclr_loss
from .losses import spectral_contrastive_loss as spectral_contrastive_loss
from .losses import vicreg_loss as vicreg_loss
from .modes import describe_modes as describe_modes
from .modes import mode_worth as mode_worth
from .modules import BarlowTwins as BarlowTwins
from .modules import JointEmbedding as JointEmbedding
from .modules import SimCLR as SimCLR
from .modules import SpectralContrastive as SpectralContrastive
from .modules import VICReg as VICReg
from .modules.acceleration import AcceleratedBarlowTwins as AcceleratedBarlowTwins
from .runs import LastCheckpoint as LastCheckpoint
from .spectrum.record import SpectrumRecord as SpectrumRecord
from .trained import load_encoder as load_encoder

__all__: list[str]
__version__: str
