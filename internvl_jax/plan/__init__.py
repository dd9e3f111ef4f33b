"""What a run would need and how fast it could be on TPUs that are not there.

`compile` hands the very step that `train` runs to the TPU compiler; `hlo` reads the program it
schedules, `trips` counts its loops, `cost` and `collectives` say what each operation moves,
`schedule` what hides what, `roofline` how long it all takes at best; `report` puts the answer
together, `show` prints and draws it, `sweep` compares many.
"""
