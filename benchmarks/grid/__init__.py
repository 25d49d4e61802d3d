"""Runs of many methods at equal cost, one JSON line each, and their page: what equal_cost and real_model share."""
