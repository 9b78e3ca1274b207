"""A page that shows what the model in this folder says about an image: `python app.py`.

`mealv2-hub export --demo` copies this file into the folder as app.py, which a Hugging Face Space runs as it is. It
needs what requirements.txt beside it lists, and not timm_mealv2.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from timm.data import create_transform, resolve_model_data_config


class Classifier:
    """The model of an exported folder, with the preprocessing that it was evaluated with.

    Attributes:
        names: What each class is called: its description or name from config.json, its number where there is none.

    Args:
        folder: The folder with config.json and model.safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        self._transform = create_transform(**resolve_model_data_config(self.model), is_training=False)
        cfg = self.model.pretrained_cfg
        self._mode = 'L' if cfg['input_size'][0] == 1 else 'RGB'
        labels = cfg.get('label_names') or [str(number) for number in range(self.model.num_classes)]
        descriptions = [(cfg.get('label_descriptions') or {}).get(label, label) for label in labels]
        # Two classes of ImageNet are called "crane": then the class's name tells which.
        self.names = [
            text if descriptions.count(text) == 1 else f'{text} ({label})'
            for label, text in zip(labels, descriptions, strict=True)
        ]

    def __call__(self, image: Image.Image | None) -> dict[str, float]:
        """Return the probability of each class by its name; nothing without an image."""
        if image is None:
            return {}
        pixels = self._transform(image.convert(self._mode)).unsqueeze(0)
        with torch.inference_mode():
            probabilities = self.model(pixels).softmax(dim=1)[0]
        return dict(zip(self.names, probabilities.tolist(), strict=True))


def build_app(folder: Path) -> Any:
    """Return the page (a `gradio.Interface`) for an exported folder."""
    import gradio  # here, so that the classifier can be used without it

    examples = sorted(str(path) for path in folder.glob('examples/*'))
    readme = folder / 'README.md'
    return gradio.Interface(
        fn=Classifier(folder),
        inputs=gradio.Image(type='pil', label='Image', height=320),
        outputs=gradio.Label(num_top_classes=5, label='Most likely classes'),
        examples=examples or None,
        cache_examples=False,
        title=ModelCard.load(readme).data.get('title') if readme.is_file() else None,
        submit_btn='Classify',
        flagging_mode='never',
    )


if __name__ == '__main__':
    build_app(Path(__file__).resolve().parent).launch()
