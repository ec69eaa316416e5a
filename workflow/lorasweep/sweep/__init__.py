"""The sweep as one object: what follows from an experiment, for rules, plans and commands."""
