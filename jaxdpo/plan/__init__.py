"""What training costs on devices that are not there: the real programs, compiled and read.

`command.py` is `jaxdpo plan`; it checks what it can and starts `worker.py` in a process of its own, whose environment
suits the compiler. There `job.py` makes the work of a step, `search.py` orders meshes by an estimate, `programs.py`
compiles, `hlo.py` and `costs.py` read what the compiler made, `roofline.py` turns it into seconds, and `report.py` into
text. Nothing is allocated and nothing runs on the devices that are planned for.
"""
