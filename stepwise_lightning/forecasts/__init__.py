"""When each mode will be learned, before training and while it runs, and up to which learning rate that is stable."""

from stepwise_lightning.callbacks.forecast_logger import ForecastLogger
from stepwise_lightning.forecasts.forecast import Forecast
from stepwise_lightning.forecasts.simulate import forecast

__all__ = ["Forecast", "ForecastLogger", "forecast"]
