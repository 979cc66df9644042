"""Where the run is followed, besides the resource's status."""

from __future__ import annotations

from pydantic import Field

from finetune_trainer.config.base import Model, SecretKeyRef, SecretRef, Url

WANDB_SLOT, MLFLOW_SLOT = "wandb", "mlflow"
"""Folders of the trackers' secrets, beside those of the sources (`JobConfig.sources`)."""
WANDB_KEY_FILE = "key"
"""In the folder of W&B's secrets: the API key."""
MLFLOW_CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Keys of the Secret with MLflow's credentials, and files in the folder of its secrets. All are optional."""


class Wandb(Model):
    """Weights & Biases: online where a key is given, else a run on the volume that can be synced later."""

    project: str = Field(min_length=1, max_length=128, description="Project.")
    entity: str | None = Field(default=None, min_length=1, max_length=128, description="User or team.")
    base_url: Url | None = Field(default=None, description="Address of a server of your own. Default: the public one.")
    api_key_secret_ref: SecretKeyRef | None = Field(default=None, description="The API key. Default: none, offline.")


class MLflow(Model):
    """An MLflow tracking server."""

    uri: Url = Field(description="Address of the tracking server.")
    experiment: str | None = Field(
        default=None, min_length=1, max_length=256, description="Experiment. Default finetune."
    )
    credentials_secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
    )


class Tracking(Model):
    """Where the run is followed. A tracker that cannot be reached is told, and never ends a training."""

    wandb: Wandb | None = Field(default=None, description="Weights & Biases.")
    mlflow: MLflow | None = Field(default=None, description="An MLflow tracking server.")
    tensorboard: bool | None = Field(
        default=None, description="TensorBoard files under report/tensorboard. Default false."
    )
