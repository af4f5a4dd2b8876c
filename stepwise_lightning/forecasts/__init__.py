"""When each mode will be learned, before training and while it runs, and up to which learning rate that is stable."""

from stepwise_lightning.forecasts.forecast import forecast
from stepwise_lightning.forecasts.logger import ForecastLogger
from stepwise_lightning.forecasts.result import Forecast

__all__ = ["Forecast", "ForecastLogger", "forecast"]
