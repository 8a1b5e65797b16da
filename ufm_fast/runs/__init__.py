"""The run library: a solve whose settings, log and state are kept in a folder, and what is made of
it.

    options      the settings: one table, from which flags, TOML keys, defaults and help are made
    settings     flags over file over preset over defaults; the Problem of a configuration; its hash
    directory    a run's folder, its lock and its log;  files: written whole or not at all
    state        W, H, b, hidden layers and the data of a run;
                 foreign: counts, targets, heads and starts from elsewhere
    model        the problem and the point of a saved run
    job          prepare or resume a run, and execute it;  log: what happens at a log point
    figures      of one run, or of several together;  exports: npz, csv, parquet

Nothing here knows of a command line. Importing the package imports no torch.
"""
