"""Runs that are killed, stopped and damaged, and must end as if they were not.

python -m tools.soak --faults=100
"""
