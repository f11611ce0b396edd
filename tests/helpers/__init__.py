"""What tests share: tiny models and data, launches, finished runs."""
