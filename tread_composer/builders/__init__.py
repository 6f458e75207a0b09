"""What a configuration becomes: model, data, algorithms, Trainer; and the folder of a run."""
