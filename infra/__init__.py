"""What lies below every stage and knows no model: storage, artifacts, configuration, logging, services."""
