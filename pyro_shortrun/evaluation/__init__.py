"""How good a trained model is: evidence, likelihood, samples, anomaly scores."""

from .anomaly import Above, Bound, Energies, Joint, Latents, Reconstruction, Score, anomaly_score, anomaly_scores
from .evidence import Evidence, ais
from .likelihood import LogLikelihood, guide_log_likelihood, importance_log_likelihood
from .two_samples import frechet_distance, squared_mmd

__all__ = [
    "Above",
    "Bound",
    "Energies",
    "Evidence",
    "Joint",
    "Latents",
    "LogLikelihood",
    "Reconstruction",
    "Score",
    "ais",
    "anomaly_score",
    "anomaly_scores",
    "frechet_distance",
    "guide_log_likelihood",
    "importance_log_likelihood",
    "squared_mmd",
]
