"""Tell nine speakers apart by two vowels, with half of the measurements missing.

Every series keeps its own times, length and gaps. A hidden state follows dz = gamma(zeta(z, X(t))) dt + sigma(t) dW,
driven by what was measured, and its last value says who spoke. Takes a minute or two; writes classify_speech.png.
"""

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import sdeflow as sf

drop_train, drop_test, split, dynamics_key, model_key, fit_key, test_key = jax.random.split(jax.random.key(0), 7)
train, test = sf.data.japanese_vowels()  # from the wheel of aeon: pip install "sdeflow[examples]"
train = train.with_buckets(29).drop_observations(0.5, key=drop_train)
test = test.with_buckets(29).drop_observations(0.5, key=drop_test)
train, validation = train.split(0.85, key=split)
train = train.standardise()
validation, test = validation.standardise(like=train), test.standardise(like=train)
print(train)

dynamics = sf.models.NeuralLangevinSDE(32, control_size=train.num_channels, key=dynamics_key)
model = sf.models.SeriesModel(dynamics, channels=train.num_channels, num_outputs=len(train.classes), key=model_key)
steps = 1000
fitted = sf.fit(
    model,
    sf.models.Thinned(train, 0.8),  # hides other measurements in every epoch
    sf.losses.CrossEntropy(),
    optim=optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=0.01)
    ),
    steps=steps,
    batch_size=32,
    key=fit_key,
    validation=validation,
    validate_every=50,
    patience=10,
)
print(fitted)

logits = fitted.model.predict(test, key=test_key, num_samples=8)
found = logits.argmax(axis=1)
print(f"accuracy on {len(test)} test series: {(found == test.labels).mean():.3f}")

figure = Figure(figsize=(10, 4), layout="constrained")
raw, confusion = figure.subplots(1, 2)
some = test[[int(np.flatnonzero(test.labels == k)[0]) for k in range(3)]]
speakers = [f"speaker {test.classes[k]}" for k in some.labels]
sf.plotting.trajectories(some.times, some.values, ax=raw, labels=speakers, marker="o")
raw.set(title="What is left of one channel", xlabel="time")
counts = np.zeros((9, 9), int)
np.add.at(counts, (test.labels, found), 1)
confusion.imshow(counts, cmap="Blues")
confusion.set(title="Test series", xlabel="speaker found", ylabel="speaker", xticks=range(9), yticks=range(9))
for (i, j), count in np.ndenumerate(counts):
    confusion.text(j, i, count, ha="center", va="center")
figure.savefig("classify_speech.png", dpi=120)
print("the figure: classify_speech.png")
