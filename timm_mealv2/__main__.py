"""`python -m timm_mealv2` lists the commands."""

COMMANDS = """\
mealv2-train       train a student on what teachers predict, or a model on labels
mealv2-eval        accuracy of models, and their agreement with teachers
mealv2-predict     the classes of pictures
mealv2-softlabels  record what teachers predict, inspect it, check it
mealv2-hub         export a model, push it to the Hugging Face Hub, pull it back
mealv2-report      a page about a run, or a comparison of runs

COMMAND --help shows how each is used.
"""

if __name__ == '__main__':
    print(COMMANDS, end='')
