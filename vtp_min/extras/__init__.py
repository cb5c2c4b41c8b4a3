"""What makes vtp_min fast, large, robust or complete. Each file serves one need. It is imported
where that need arises; no core file imports an extra at module level.

training
    finetune.py          --init: stage 1 starts from released weights, or from those of a run
    gan.py               stage 2: the pixel decoder alone, with a discriminator (VTP Sec. 3.2)
    baselines.py         LDM's auto-encoder, VA-VAE, RAE: what the paper compares with
    gradcache.py         --micro: the gradient of a large batch in the memory of a small one
    perceptual.py        LPIPS, and a perceptual loss of ours
    efficientnet.py      an ImageNet classifier that pip installs: judge and perceptual loss
    collapse.py          warnings of collapse
speed
    fast.py              faster forms of functions of the core, for CPUs
    fast_dit.py          the same for dit.py
    fast_views.py        the same for crops and colour jitter
data and files
    files.py             reads files that may be damaged; errors name the file; network files
    run_folder.py        locks a run folder, protects files of others, recognises data that moved
    checkpoints.py       finds the newest checkpoint, verifies it, and maps it into memory
    model_card.py        README.md of a run, for the Hugging Face Hub
    rendezvous.py        how processes meet, also after a restart; what is said if one is lost
    output.py            a closed pipe or terminal does not end a training
    workers.py           processes that load data, also where shared memory is small
    slices.py            training batches from workers, in slices
    class_folders.py     class folders: splits, labels, class names
    shards.py            tar shards: index and random access
    images.py            reads any image file
    latents.py           latents on disk, in LightningDiT's format
    sample_folder.py     a folder of generated images
    previews.py          samples at several steps of the training of a DiT
    grid.py              a contact sheet
    weights.py           external weights: address, hash, download
    flag_ranges.py       ranges of the numbers on the command line
evaluation
    commands.py          check, cost, report, compare and fetch of eval.py
    probe_official.py    the linear probe of the released code
    judges.py            features for a Frechet distance where Inception is not at hand
    image_sets.py        the sets of images that a Frechet distance compares
    cost.py              parameters and FLOPs
    plan.py              memory, FLOPs and time of a run, before it starts
    check.py             released weights: known facts, and your own images
    report.py            a run as one HTML page
    compare.py           is the log of a run on the curve of reference logs?
"""
