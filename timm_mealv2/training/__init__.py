"""The training program: arguments -> build -> run -> loop. Nothing here is imported by `import timm_mealv2`."""
