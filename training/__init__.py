"""SENet training: data, teacher, sensitivity, budgets, mask search, distillation."""
