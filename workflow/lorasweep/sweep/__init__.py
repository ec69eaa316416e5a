"""The sweep as one object: points, jobs and files of an experiment, for rules, plans and commands."""
