"""Rivals without a package that works: one file a method, each tested against its paper's formulas."""
