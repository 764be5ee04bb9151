PROGRAMS = ("train", "generate")  # that can be compiled, see `plan.py`
