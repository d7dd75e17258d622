"""The tasks, a module each: how a trained model is asked, and what its answers are worth.

Every module has the same few names:
    METRIC                              what "best" means: its name, and +1 if higher is better
    Protocol                            how whole images are predicted; one row per data set
    predict(model, images, ...)         a batch's answer by a protocol
    evaluate(model, dataset, ...)       metrics of a whole set, with pictures and exported answers
    report(metrics, dataset)            prints the metrics
    prepare(recipe, boxes)              what `apply` needs besides the model
    apply(model, image, ...)            the answer for one of the user's own pictures, as files
    view(image, file, recipe, ready)    the picture that the model gets of it, in one piece
    written(recipe, ready)              what `apply` writes, in words
"""
from tasks import depth, pose, refer, seg

TASKS = {"seg": seg, "depth": depth, "pose": pose, "refer": refer}
