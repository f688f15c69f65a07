"""One invented row for each data set of P3 in the lists, with the columns of the real one.

Keys are the data set's folders among promptsource's templates. Labels are numbers, as on the hub.
"""

from typing import Any

_QA = {"text": ["the lake"], "answer_start": [0]}
_STORY = "The goose swam. The swan flew. The lake was deep and the reeds were high."
_NLI = {"premise": "The goose sleeps by the lake.", "hypothesis": "The goose is awake."}
_ABCD = ["by the lake", "in the reeds", "on the roof", "at sea"]
_RACE = {"article": _STORY, "question": "Where was it?", "options": _ABCD, "answer": "B"}
_PAIR = {"sentence1": "The goose flies.", "sentence2": "A goose is flying.", "label": 1, "idx": 0}
_COPA = {"premise": "The ice melted.", "choice1": "It was warm.", "choice2": "It was night."}

ROWS: dict[str, dict[str, Any]] = {
    "adversarial_qa/adversarialQA": {
        **{"id": "1", "title": "Birds", "context": _STORY, "question": "What was deep?"},
        **{"answers": _QA, "metadata": {"split": "train", "model_in_the_loop": "x"}},
    },
    "ag_news": {"text": "Geese won the cup.", "label": 1},
    "amazon_polarity": {"title": "Good", "content": "I like this lamp a lot.", "label": 1},
    "anli": {**_NLI, "uid": "1", "label": 2, "reason": "It sleeps."},
    "app_reviews": {
        **{"package_name": "com.goose", "review": "It works.", "date": "2016", "star": 4}
    },
    "cnn_dailymail/3.0.0": {"id": "1", "article": _STORY, "highlights": "A goose swam."},
    "common_gen": {
        "concept_set_idx": 0,
        "concepts": ["goose", "lake", "swim"],
        "target": "It swam.",
    },
    "commonsense_qa": {
        **{"id": "1", "question": "Where do geese swim?", "question_concept": "goose"},
        **{"choices": {"label": list("ABCDE"), "text": [*_ABCD, "nowhere"]}, "answerKey": "A"},
    },
    "cos_e/v1.11": {
        **{"id": "1", "question": "Where do geese swim?", "choices": [*_ABCD, "nowhere"]},
        **{"answer": "by the lake", "abstractive_explanation": "lakes are wet"},
        **{"extractive_explanation": "geese swim"},
    },
    "cosmos_qa": {
        **{"id": "1", "context": _STORY, "question": "Why?", "label": 2},
        **{f"answer{i}": text for i, text in enumerate(_ABCD)},
    },
    "dbpedia_14": {"title": "Goose", "content": "A goose is a bird.", "label": 9},
    "dream": {
        **{"id": 1, "dialogue_id": "1", "dialogue": ["W: Where is it?", "M: By the lake."]},
        **{"question": "Where is it?", "choice": _ABCD[:3], "answer": "by the lake"},
    },
    "duorc/ParaphraseRC": {
        **{"plot_id": "1", "plot": _STORY, "title": "Birds", "question_id": "1"},
        **{"question": "What was deep?", "answers": ["the lake"], "no_answer": False},
    },
    "gigaword": {"document": "a goose swam on the lake", "summary": "goose swims"},
    "glue/mrpc": _PAIR,
    "glue/qqp": {"question1": "Is it deep?", "question2": "How deep is it?", "label": 0, "idx": 0},
    "hellaswag": {
        **{"ind": 1, "activity_label": "Swimming", "ctx_a": "A goose swims.", "ctx_b": "it"},
        **{"ctx": "A goose swims. it", "endings": ["dives.", "flies.", "sings.", "reads."]},
        **{"source_id": "1", "split": "train", "split_type": "indomain", "label": "0"},
    },
    "hotpot_qa/fullwiki": {
        **{"id": "1", "question": "Is the lake deep?", "answer": "yes", "type": "comparison"},
        **{"level": "easy", "supporting_facts": {"title": ["Lake"], "sent_id": [0]}},
        "context": {"title": ["Lake", "Goose"], "sentences": [["It is deep."], ["It swims."]]},
    },
    "imdb": {"text": "A film about geese, and a good one.", "label": 1},
    "multi_news": {"document": "A goose swam. ||||| A swan flew.", "summary": "– Birds moved."},
    "paws/labeled_final": {
        **{"id": 1, "sentence1": "A goose swam.", "sentence2": "It was a goose.", "label": 0}
    },
    "qasc": {
        **{"id": "1", "question": "What do geese need?", "answerKey": "B"},
        **{"choices": {"text": ["sand", "water", "ice"], "label": ["A", "B", "C"]}},
        **{
            "fact1": "geese swim",
            "fact2": "swimming needs water",
            "combinedfact": "geese need water",
        },
        **{"formatted_question": "What do geese need? (A) sand (B) water (C) ice"},
    },
    "quail": {
        **{"id": "1", "context_id": "1", "question_id": "1", "domain": "fiction"},
        **{"metadata": {"author": "a", "title": "t", "url": "u"}, "context": _STORY},
        **{"question": "What was deep?", "question_type": "Factual", "correct_answer_id": 1},
        "answers": ["not enough information", "the lake", "the reeds", "the goose"],
    },
    "quarel": {
        **{"id": "1", "answer_index": 1, "logical_forms": ["x"], "logical_form_pretty": "x"},
        **{"world_literals": {"world1": ["sand"], "world2": ["ice"]}},
        "question": "It slid farther on sand or on ice? (A) sand (B) ice",
    },
    "quartz": {
        **{"id": "1", "question": "If it is colder, ice is ____.", "answerKey": "A"},
        **{"choices": {"text": ["thicker", "thinner"], "label": ["A", "B"]}},
        **{"para": "Cold makes ice thick.", "para_id": "1", "para_anno": {"effect_prop": "x"}},
        "question_anno": {"more_effect_dir": "x"},
    },
    "quoref": {
        **{
            "id": "1",
            "question": "What was deep?",
            "context": _STORY,
            "title": "Birds",
            "url": "u",
        },
        "answers": {"answer_start": [0], "text": ["the lake"]},
    },
    "race/high": {**_RACE, "example_id": "1"},
    "race/middle": {**_RACE, "example_id": "2"},
    "ropes": {
        **{"id": "1", "background": "Geese swim in water.", "situation": _STORY},
        **{"question": "Where did it swim?", "answers": {"text": ["the lake"]}},
    },
    "rotten_tomatoes": {"text": "a film about geese", "label": 0},
    "samsum": {"id": "1", "dialogue": "A: Swim?\nB: Yes.", "summary": "They swim."},
    "sciq": {
        **{
            "question": "What do geese swim in?",
            "correct_answer": "water",
            "support": "They swim.",
        },
        **{f"distractor{i}": text for i, text in enumerate(["sand", "ice", "tar"], start=1)},
    },
    "social_i_qa": {
        **{"context": "Goose swam.", "question": "Why?", "label": "2"},
        **{"answerA": "to fly", "answerB": "to get wet", "answerC": "to sleep"},
    },
    "story_cloze/2016": {
        **{"story_id": "1", "answer_right_ending": 2},
        **{f"input_sentence_{i}": f"The goose swam {i} times." for i in range(1, 5)},
        **{"sentence_quiz1": "It flew.", "sentence_quiz2": "It was tired."},
    },
    "super_glue/cb": {**_NLI, "idx": 0, "label": 1},
    "super_glue/copa": {**_COPA, "question": "cause", "idx": 0, "label": 0},
    "super_glue/rte": {**_NLI, "idx": 0, "label": 1},
    "super_glue/wic": {
        **{"word": "bank", "sentence1": "The bank is wet.", "sentence2": "The bank is open."},
        **{"start1": 4, "start2": 4, "end1": 8, "end2": 8, "idx": 0, "label": 0},
    },
    "super_glue/wsc.fixed": {
        **{"text": "The goose met the swan and it flew.", "span1_index": 1, "span2_index": 6},
        **{"span1_text": "The goose", "span2_text": "it", "idx": 0, "label": 1},
    },
    "trec": {"text": "How deep is the lake?", "coarse_label": 4, "fine_label": 40},
    "web_questions": {"url": "u", "question": "where do geese swim?", "answers": ["Lake", "Sea"]},
    "wiki_bio": {
        "input_text": {
            "table": {
                "column_header": ["name", "article_title"],
                "row_number": [1, 1],
                "content": ["greta goose", "greta goose"],
            },
            "context": "greta goose",
        },
        "target_text": "greta goose is a bird .",
    },
    "wiki_hop/original": {
        **{"id": "1", "question": "country goose lake", "answer": "canada"},
        **{"candidates": ["canada", "norway"], "supports": ["Goose lake is in Canada."]},
        "annotations": [["x"]],
    },
    "wiki_qa": {
        **{"question_id": "Q1", "question": "how deep is it?", "document_title": "Lake"},
        **{"answer": "It is deep.", "label": 1},
    },
    "winogrande/winogrande_xl": {
        **{"sentence": "The goose met the swan and _ flew.", "option1": "goose", "option2": "swan"},
        "answer": "2",
    },
    "wiqa": {
        **{"question_stem": "suppose it rains, how will it affect the lake?"},
        **{"question_para_step": ["Rain falls.", "Rivers fill.", "The lake rises."]},
        **{"answer_label": "more", "answer_label_as_choice": "A"},
        **{"choices": {"text": ["more", "less", "no effect"], "label": ["A", "B", "C"]}},
        **{"metadata_question_id": "1", "metadata_graph_id": "1", "metadata_para_id": "1"},
        **{"metadata_question_type": "INPARA_EFFECT", "metadata_path_len": 2},
    },
    "xsum": {"document": _STORY, "summary": "A goose swam.", "id": "1"},
    "yelp_review_full": {"label": 3, "text": "Good food by the lake."},
}
