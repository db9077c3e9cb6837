"""The progressive recipe of dvpa: stages as data, a thin LightningModule, resumable runs."""
