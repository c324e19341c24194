"""What other people write: answers of models, data sets, frames that another selector chose."""
