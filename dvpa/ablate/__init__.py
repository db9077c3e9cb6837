"""`dvpa ablate`: sweeps over recipes and tier maps, measured in pairs.

study.py reads the YAML; jobs.py runs processes; models.py reads what a trained point left;
measure.py puts one map on one model; summary.py joins seeds; report.py writes.

Three kinds of work, by cost. A *training point* (recipe variant, seed) takes minutes and is done
once: its folder is named after a hash of what it depends on. The tables of outcomes come with it. A
*map point* (training point, map variant) is computed from the tables in seconds. A *configuration*
is a recipe variant with a map variant; its numbers are over all seeds.
"""
