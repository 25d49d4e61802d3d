"""How a student is measured: sampled answers, grades, scores with intervals."""
