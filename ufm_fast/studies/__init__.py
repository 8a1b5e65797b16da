"""Studies: many solves over axes of settings, kept in one folder, that go on after anything.

    spec         the study file, read and checked: [solve], [axes], [derived], [study], [plots]
    expressions  derived values: lambda or d as an expression of K, n, N
    cells        the cells of a study, each named by the hash of its settings that are not the
                 default
    folder       DIR: study.toml, cells/NAME (a run directory each), table.csv;  table: its rows
    worker       a process that forks one for each cell;  runner: jobs, shards, signals, restarts
    predict      memory and time of a cell before it runs
    library      ``study``, the call from Python;  ready: studies that ship with the package
    show         mean and spread over seeds;  figures: any column against any axis

Everything stands on the run library (`ufm_fast.runs`); nothing here knows of a command line. A cell
is a run directory as ``ufm-fast solve`` makes it, so all that reads one reads a cell. The package
is called ``studies`` because ``ufm_fast.study`` is the function. Importing it imports no torch.
"""
