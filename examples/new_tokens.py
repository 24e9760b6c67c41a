"""A language model gets new tokens: Hugging Face's Trainer, with LoRA on the other layers.

The model is trained here on a few sentences, so that nothing is downloaded; any model of
`from_pretrained` takes its place.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from partial_embedding.recipes.small_language_model import small_language_model
from partial_embedding.torch import add_tokens
from partial_embedding.torch.row_files import save_rows

torch.manual_seed(0)
SENTENCES = [
    "the quokka sat on a mat",
    "a numbat ran to the quokka",
    "the cat saw a numbat",
]
model, tokenizer = small_language_model(
    ["the cat sat on a mat", "a dog ran to the cat", "the dog saw a cat"], steps=50
)
tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)

# Until now the words are pieces; now each has a row, which begins as the mean of its pieces.
print(tokenizer.tokenize("quokka"))
rows = add_tokens(model, tokenizer, ["quokka", "numbat"])
print(tokenizer.tokenize("quokka"), rows)

# LoRA freezes what it finds, and learns beside the rows.
lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
peft_model = get_peft_model(model, lora)
before = model.get_input_embeddings().weight.detach().clone()

trainer = Trainer(
    peft_model,
    TrainingArguments(
        "runs/new_tokens",
        num_train_epochs=20,
        per_device_train_batch_size=3,
        learning_rate=0.01,
        weight_decay=0.1,
        max_grad_norm=1.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=[tokenizer(text) for text in SENTENCES],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()

after = model.get_input_embeddings().weight
assert (after != before).any(dim=1).nonzero().flatten().tolist() == rows
save_rows(model, "runs/new_tokens/rows.safetensors", tokenizer)  # two rows, not the model
