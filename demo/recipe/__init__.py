"""How the demo model was made: data, training, evaluation. Run it with `python -m kolors_nodes.demo.recipe`."""
