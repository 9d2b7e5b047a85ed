"""What is measured of a policy: accuracies, J and what is attained of it, the Gaussian view of pairs."""
