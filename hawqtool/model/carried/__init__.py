"""What later blocks read of earlier blocks' outputs, carried leaf by leaf in the walk's one tensor of states."""
