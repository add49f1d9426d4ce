"""What a training is told: dataclasses of options, over recipes and YAML files, from the command line."""
