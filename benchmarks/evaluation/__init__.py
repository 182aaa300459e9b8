"""Speed and memory of ranking, metrics and recommendations, beside other libraries."""
