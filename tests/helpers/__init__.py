"""What many tests share: problems with closed forms, batteries over solvers, order estimators, statistics."""
