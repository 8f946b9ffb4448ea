import re
import subprocess
import sys
import unicodedata
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gpt.clean.cleaning import (
    LANGUAGES,
    STEPS,
    Cleaner,
    CleanParams,
    Quality,
    broken_rules,
    normalize,
    remove_control_characters,
    repair_mojibake,
    strip_gutenberg,
)

STORIES = (Path(__file__).parents[3] / "samples/stories.txt").read_text().split("<|endoftext|>\n")
EVERYTHING = CleanParams(
    unicode="NFKC",
    mojibake=True,
    control_characters=True,
    gutenberg=True,
    min_chars=2,
    max_chars=1000,
    languages=("en", "de"),
    language_min_chars=0,
    quality=Quality(min_words=1),
)
# --- any text: letters, accents, controls, mojibake, halves of surrogates, Gutenberg's marks
MARKS = [
    "*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***",
    "*** START OF THIS PROJECT GUTENBERG EBOOK A\nLONG TITLE ***",
    "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***",
    "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
    "End of Project Gutenberg's Emma, by Jane Austen",
    "*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***",
    "Produced by Jane Doe",
]
ANY_TEXT = st.lists(
    st.one_of(
        st.text(st.characters(), max_size=20),
        st.text(
            "aeé\u0301\u0323\u00ad\u200b\u200d\u212b\ufb01\x00\x1b[1m\x85\r\n \u2028Ã©â€™œ\xa0"
        ),
        st.sampled_from(["Ã©", "â€™", "ÃƒÂ©", "Ã\xa0", "æ—¥", "\r\n", "\n", " ", *MARKS]),
    ),
    max_size=12,
).map("".join)


def clean(text, **params):
    return Cleaner(CleanParams(**params))(text)


# --- the cleaner ----------------------------------------------------------------------------------


def test_a_text_that_needs_no_cleaning_is_the_very_same_object():
    text = "Nothing to do here: ünïcödé, 日本語, \u200bcontrols\r\n and all."
    cleaned = clean(text)
    assert cleaned.text is text
    assert cleaned.removed is None
    assert cleaned.changed == ()


@given(ANY_TEXT)
def test_cleaning_that_is_not_asked_for_loses_nothing(text):
    cleaned = clean(text)
    if cleaned.removed is None:
        assert unicodedata.normalize("NFD", cleaned.text) == unicodedata.normalize("NFD", text)
    else:
        assert cleaned.removed == "blank"
        assert not text.strip()


@settings(deadline=None)  # the first text loads the libraries
@given(ANY_TEXT)
def test_with_every_step_and_filter_on_no_text_raises_and_changes_are_named_in_order(text):
    cleaned = Cleaner(EVERYTHING)(text)
    assert (cleaned.text == "") == (cleaned.removed is not None)
    names = [name for name, _, _ in cleaned.changed]
    assert names == [step for step in STEPS if step in names]
    for _, before, after in cleaned.changed:
        assert before != after
        assert max(len(before), len(after)) <= 80


@pytest.mark.parametrize(
    "step",
    [
        repair_mojibake,
        partial(normalize, "NFC"),
        partial(normalize, "NFKC"),
        remove_control_characters,
        strip_gutenberg,
    ],
)
def test_every_step_taken_twice_is_as_taken_once(step):
    @settings(deadline=None)
    @given(ANY_TEXT)
    def check(text):
        once = step(text)
        assert step(once) == once

    check()


@example("e\u200b\u0301")  # an accent behind something invisible: one letter once that is gone
@given(ANY_TEXT)
def test_the_steps_in_their_order_leave_nothing_to_each_other(text):
    cleaner = Cleaner(CleanParams(control_characters=True, gutenberg=True))
    once = cleaner(text).text
    assert cleaner(once).text == once


def test_an_excerpt_shows_the_first_difference_and_little_around_it():
    text = "x" * 5000 + "before \u200bafter" + "y" * 5000
    ((step, before, after),) = clean(text, control_characters=True).changed
    assert step == "control_characters"
    assert before == "x" * 13 + "before \u200bafter" + "y" * 54
    assert after == "x" * 13 + "before after" + "y" * 55


def test_blank_and_too_short_and_too_long_documents_are_removed_by_name():
    assert clean(" \n\t\u3000").removed == "blank"
    assert clean("\u200b\ufeff", control_characters=True).removed == "blank"
    assert clean("abc", min_chars=4).removed == "min_chars"
    assert clean("abcd", min_chars=4, max_chars=4).text == "abcd"
    removed = clean("abcde", max_chars=4)
    assert (removed.text, removed.removed) == ("", "max_chars")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_chars": 5, "max_chars": 4}, "min_chars 5 is more than max_chars 4"),
        ({"languages": ["en", "xx"]}, "unknown language 'xx'; the languages are ace, af, "),
        ({"near_duplicates": 1.0}, "less than 1"),
        ({"near_duplicates": 0}, "greater than 0"),
        ({"language_confidence": 1.5}, "less than or equal to 1"),
        ({"unicode": "NFD"}, "'NFC', 'NFKC' or 'none'"),
        ({"lowercase": True}, "lowercase"),
        ({"quality": {"min_words": 9, "max_words": 8}}, "min_words 9 is more than max_words 8"),
        ({"quality": {"min_word_length": 20}}, "min_word_length 20.0 is more than max_word"),
        ({"quality": {"stop_words": ["the"]}}, "min_stop_words 2 is more than there are"),
        ({"quality": {"top_ngrams": [0.2, 1.1]}}, "less than or equal to 1"),
    ],
)
def test_parameters_that_cannot_be_met_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        TypeAdapter(CleanParams).validate_python(wrong)


def test_parameters_survive_being_written_and_read():
    assert TypeAdapter(CleanParams).validate_python(asdict(EVERYTHING)) == EVERYTHING


def test_importing_loads_none_of_the_heavy_libraries():
    """Worker processes import these modules: each would wait for what it does not use."""
    heavy = "{'torch', 'pandas', 'scipy', 'ftfy', 'datasketch', 'py3langid'}"
    code = (
        f"import gpt.clean.cleaning, gpt.clean.duplicates, sys; print({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "meant"),
    [
        ("schÃ¶n, mÃ¼de", "schön, müde"),
        ("Itâ€™s a â€œtestâ€\x9d", "It’s a “test”"),
        ("ÃƒÂ©tÃƒÂ©", "été"),  # twice
        ("one lÃ¯ne\nand a fine ligne: été", "one lïne\nand a fine ligne: été"),
        ("ПривРµС‚", "Привет"),
    ],
)
def test_wrongly_decoded_text_is_repaired(broken, meant):
    assert clean(broken, mojibake=True).text == meant


@pytest.mark.parametrize(
    "text",
    [
        "“Smart” ‘quotes’ …",
        "ﬁne &amp; dandy",
        "ＡＢＣ",
        "ä\r\nb\u2028",
        "\x1b[1mfür",
        "Ünïcödé",
        "日本",
    ],
)
def test_repairing_wrong_decodings_changes_nothing_else(text):
    assert clean(text, mojibake=True, unicode="none").text == text


def test_normal_forms():
    text = "e\u0301 \u212b ﬁ x²"
    assert clean(text).text == "é Å ﬁ x²"
    assert clean(text, unicode="NFKC").text == "é Å fi x2"
    assert clean(text, unicode="none").text == text


def test_control_and_invisible_characters_go_and_what_changes_the_reading_stays():
    dirty = "\ufeffOne\x00 \x1b[31;1mred\x1b[0m\r\nso\u00adft\rzero\u200bwidth\u2028\u202eleft"
    dirty += "\x85end\ud800"
    assert remove_control_characters(dirty) == "One red\nsoft\nzerowidth\nleft\nend"
    kept = "tab\tnew\nline \xa0 می\u200cخواهم 👩\u200d🚀 क्\u200dष ❤\ufe0f \u0600"
    assert remove_control_characters(kept) == kept


HEADER = "The Project Gutenberg eBook of Emma\n\nTitle: Emma\n\nLanguage: English\n\n"
BODY = "  VOLUME I\n\nEmma Woodhouse, handsome, clever, and rich.\n\nFINIS"
LICENCE = (
    "\n\nUpdated editions will replace the previous one.\n*** START: FULL LICENSE ***\nRead.\n"
)


@pytest.mark.parametrize(
    "start",
    [
        "*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***",
        "*** START OF THIS PROJECT GUTENBERG EBOOK EMMA ***",
        "***START OF THE PROJECT GUTENBERG EBOOK EMMA***",
        "***START OF THE PROJECT GUTENBERG E-BOOK EMMA***\r",
        "*** START OF THE COPYRIGHTED PROJECT GUTENBERG EBOOK EMMA ***",
        "*** START OF THIS PROJECT GUTENBERG EBOOK THE WHOLE\nAND TRUE STORY OF EMMA ***",
        "*** START OF THIS PROJECT GUTENBERG ETEXT EMMA",
        "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
        "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nWhy is this small "
        "print here?\n*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.07.02.92*END*",
        "*** START OF THIS PROJECT GUTENBERG EBOOK EMMA ***\n\n\nProduced by Jane Doe and\n"
        "the Distributed Proofreaders\n\nE-text prepared by Jane Doe",
    ],
)
@pytest.mark.parametrize(
    "end",
    [
        "*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***",
        "*** END OF THIS PROJECT GUTENBERG EBOOK EMMA ***",
        "***END OF THE PROJECT GUTENBERG EBOOK EMMA***",
        "End of the Project Gutenberg EBook of Emma, by Jane Austen\n\n"
        "*** END OF THIS PROJECT GUTENBERG EBOOK EMMA ***",
        "End of Project Gutenberg's Emma, by Jane Austen",
        "End of Project Gutenberg\u2019s Emma, by Jane Austen",
        "End of The Project Gutenberg Etext of Emma, by Jane Austen",
        "End of this Project Gutenberg Etext of Emma",
    ],
)
def test_gutenbergs_header_and_licence_go_in_all_their_wordings(start, end):
    book = f"{HEADER}{start}\n\n\n{BODY}\n\n\n{end}\n{LICENCE}"
    assert strip_gutenberg(book) == BODY
    assert strip_gutenberg(f"{HEADER}{start}\n\n\n{BODY}") == BODY
    assert strip_gutenberg(f"{BODY}\n\n\n{end}\n{LICENCE}") == BODY
    assert strip_gutenberg(book + book) == f"{BODY}\n\n{BODY}"
    assert strip_gutenberg(book.replace("\n", "\r\n")) == BODY.replace("\n", "\r\n")


def test_gutenbergs_small_print_at_the_end_takes_no_book_with_it():
    book = BODY + "\n\nShe was right." * 1000
    small_print = (
        "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nWhy is this here?\n"
        "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n"
    )
    end = "End of Project Gutenberg's Emma\n\n"
    assert strip_gutenberg(f"{book}\n\n{end}{small_print}") == book
    assert strip_gutenberg(f"{book}\n\n{small_print}") == book


def test_gutenbergs_marks_in_broken_files_cost_no_more_than_a_line():
    """A mark or credits without the end they should have."""
    start, line = "*** START OF THE PROJECT GUTENBERG EBOOK EMMA\n", "x " * 50_000 + "\n"
    assert strip_gutenberg(start + line * 5) == (line * 5).strip("\n")
    assert strip_gutenberg(start + "Produced by Jane\n" + line * 12) == (line * 5).strip("\n")


@pytest.mark.parametrize(
    "text",
    [
        "\n\nHe was the end of Project Gutenberg's patience.\n\n",
        "End of Project Gutenberg and the beginning of Johann Gutenberg's own press.\n",
        "The start of this project: Gutenberg.\n\nProduced by hand.\n",
    ],
)
def test_a_text_that_speaks_of_gutenberg_stays_as_it_is(text):
    assert strip_gutenberg(text) == text


# --- languages ------------------------------------------------------------------------------------

OTHER_LANGUAGES = {
    "de": [
        "Am frühen Morgen ging die alte Frau zum Bahnhof, weil sie ihren Bruder abholen wollte. "
        "Der Zug hatte, wie so oft in diesem Winter, mehr als eine Stunde Verspätung. Sie setzte "
        "sich auf eine Bank, zog ihren Mantel enger und sah den Tauben zu, die zwischen den "
        "Gleisen nach Krümeln suchten. Als der Zug endlich kam, stieg niemand aus. Erst der "
        "Schaffner erklärte ihr, dass der letzte Wagen noch in Hannover stehe.",
        "Wer einen Garten anlegen will, braucht vor allem Geduld. Zuerst wird der Boden "
        "gelockert und von Steinen befreit, danach mischt man reifen Kompost unter die Erde. "
        "Empfindliche Pflanzen dürfen erst nach den letzten Frösten ins Freie. Im Sommer muss "
        "regelmäßig gegossen werden, am besten abends, damit das Wasser nicht sofort verdunstet. "
        "Die Ernte entschädigt dann für alle Mühen.",
    ],
    "fr": [
        "Le boulanger du village se levait chaque nuit à trois heures pour allumer son four. "
        "Pendant que la pâte reposait, il ouvrait la porte et regardait les étoiles au-dessus de "
        "la place. Les premiers clients arrivaient avant l'aube, encore à moitié endormis. Ils "
        "demandaient toujours la même chose, mais il leur répondait comme s'il les voyait pour "
        "la première fois. C'était, disait-il, la moitié du métier.",
        "La bibliothèque municipale sera fermée pendant tout le mois d'août en raison de "
        "travaux. Les lecteurs pourront rendre leurs ouvrages dans la boîte installée près de "
        "l'entrée. Aucune pénalité de retard ne sera appliquée durant cette période. À la "
        "rentrée, une nouvelle salle de lecture accueillera les enfants et leurs parents. Nous "
        "vous remercions de votre patience et vous souhaitons de bonnes vacances.",
    ],
    "es": [
        "Mi abuelo guardaba en el desván una caja llena de cartas que nunca había enviado. Las "
        "escribía por la noche, cuando todos dormían, y las firmaba con un nombre que no era el "
        "suyo. Después de su muerte las leímos en voz alta alrededor de la mesa de la cocina. "
        "Ninguno de nosotros sabía quién era la mujer a la que hablaba con tanta ternura. Mi "
        "madre lloró un poco y luego se echó a reír.",
        "Para preparar una buena tortilla hacen falta huevos frescos, patatas, cebolla y "
        "bastante aceite. Se cortan las patatas en rodajas finas y se fríen despacio, sin que "
        "lleguen a dorarse. Mientras tanto se baten los huevos con una pizca de sal. Todo se "
        "mezcla y se deja reposar unos minutos antes de volver a la sartén. Lo más difícil, como "
        "sabe cualquiera, es darle la vuelta.",
    ],
    "it": [
        "Ogni domenica il signor Bruno portava il suo cane lungo il fiume fino al vecchio "
        "mulino. Camminavano piano, perché tutti e due avevano ormai una certa età. Davanti alla "
        "chiusa si fermavano sempre a guardare l'acqua che cadeva. Gli altri passanti li "
        "salutavano e chiedevano come stessero. Lui rispondeva che il cane stava benissimo e che "
        "il padrone faceva quello che poteva.",
        "Il museo è aperto dal martedì alla domenica, dalle nove del mattino alle sette di sera. "
        "L'ingresso è gratuito per i bambini e per gli studenti che mostrano un documento "
        "valido. Nelle sale del primo piano si trovano i dipinti più antichi della collezione. È "
        "vietato toccare le opere e usare il flash durante le fotografie. Le visite guidate "
        "cominciano ogni ora davanti alla biglietteria.",
    ],
    "pt": [
        "Quando a chuva começou, os pescadores já tinham puxado os barcos para a areia. As "
        "mulheres recolheram depressa a roupa que secava nas cordas e fecharam as janelas. "
        "Durante dois dias ninguém saiu de casa, a não ser para ir buscar pão. Na manhã do "
        "terceiro dia o mar estava liso como um espelho. Encontraram então na praia uma garrafa "
        "com uma mensagem que ninguém conseguiu ler.",
        "A nova linha de comboio vai ligar as duas cidades em menos de uma hora. Segundo o "
        "governo, as obras deverão estar concluídas no próximo ano, mas muitos moradores não "
        "acreditam nessa promessa. Já houve vários atrasos e o orçamento não parou de aumentar. "
        "Entretanto, os passageiros continuam a viajar em autocarros velhos e cheios. As "
        "associações de bairro pedem informações mais claras.",
    ],
    "nl": [
        "De molenaar had drie dochters, die alle drie beter konden rekenen dan hijzelf. Zij "
        "hielden de boeken bij en wisten precies hoeveel zakken meel er nog in de schuur lagen. "
        "Toen er een strenge winter kwam, rekenden zij uit dat het graan niet genoeg zou zijn. "
        "De boeren wilden het eerst niet geloven. Maar in het voorjaar bedankten ze de meisjes, "
        "want niemand in het dorp had honger geleden.",
        "Fietsen is in deze stad de snelste manier om ergens te komen. Toch gebeuren er elk jaar "
        "nog te veel ongelukken, vooral op drukke kruispunten. Daarom heeft de gemeente besloten "
        "om bredere paden aan te leggen en de verlichting te verbeteren. Automobilisten moeten "
        "voortaan een andere route nemen. Niet iedereen is blij met dat plan, maar de meeste "
        "bewoners vinden het een goed idee.",
    ],
    "pl": [
        "Stary zegarmistrz mieszkał nad swoim warsztatem, w kamienicy przy rynku. Każdego "
        "wieczoru nakręcał wszystkie zegary, a potem siadał w fotelu i słuchał, jak tykają. "
        "Sąsiedzi mówili, że potrafi naprawić wszystko oprócz własnego serca. Pewnego dnia "
        "przyszła do niego mała dziewczynka z zepsutą pozytywką. Nie miała pieniędzy, więc "
        "zapłaciła mu piosenką, którą śpiewała jej babcia.",
        "Jutro na północy kraju spodziewane są przelotne opady deszczu, a w górach może spaść "
        "pierwszy śnieg. Temperatura w ciągu dnia nie przekroczy dziesięciu stopni. Wiatr będzie "
        "umiarkowany, nad morzem chwilami silny i porywisty. Kierowcy powinni zachować "
        "ostrożność, ponieważ na drogach może być ślisko. W weekend pogoda stopniowo się poprawi "
        "i wróci słońce.",
    ],
    "ru": [
        "Учитель вошёл в класс, положил на стол тетради и долго молчал. За окном падал мокрый "
        "снег, и деревья во дворе казались совсем чёрными. Дети ждали, что он начнёт их ругать "
        "за вчерашнюю контрольную. Но он вдруг улыбнулся и сказал, что сегодня они пойдут "
        "смотреть на реку. Лёд уже трещал, и такого случая могло больше не представиться.",
        "Чтобы испечь хороший хлеб, нужны только мука, вода, соль и немного терпения. Закваску "
        "готовят заранее и держат в тёплом месте под чистым полотенцем. Тесто следует вымешивать "
        "руками, пока оно не станет гладким и упругим. Затем его оставляют на несколько часов, "
        "чтобы оно поднялось. Горячий хлеб резать нельзя, хотя удержаться от этого очень трудно.",
    ],
    "sv": [
        "När isen äntligen gick upp rodde pojkarna ut till den lilla ön mitt i sjön. De hade "
        "hört att det fanns en gammal stuga där som ingen längre ägde. Dörren stod öppen och på "
        "bordet låg en uppslagen bok, som om någon just hade gått ut. De vågade inte röra "
        "någonting. På vägen hem sade ingen av dem ett ord, men alla tänkte på samma sak.",
        "Föreningen håller sitt årsmöte på torsdag klockan sju i skolans matsal. Alla medlemmar "
        "är välkomna och det bjuds på kaffe och hembakade bullar. Den som vill ta upp en "
        "särskild fråga måste meddela styrelsen senast på måndag. Efter mötet visar vi bilder "
        "från sommarens utflykter. Glöm inte att betala avgiften för det nya året.",
    ],
    "tr": [
        "Köyün en yaşlı adamı her akşam aynı ağacın altında oturur, gelip geçenlere eski günleri "
        "anlatırdı. Çocuklar onun hikâyelerini çok sever, hiçbirini kaçırmak istemezlerdi. Bir "
        "gün ağacın altı boş kaldı ve herkes çok üzüldü. Meğer ihtiyar, yıllardır görmediği "
        "kardeşini ziyarete gitmiş. Döndüğünde anlatacak daha da çok şeyi vardı.",
        "Belediye, kent merkezindeki eski pazar yerini yeniden düzenlemeye karar verdi. "
        "Yapılacak çalışmalar sırasında esnaf geçici olarak başka bir alana taşınacak. "
        "Yetkililer, yeni binanın hem daha güvenli hem de daha ferah olacağını söylüyor. Bazı "
        "satıcılar ise müşterilerini kaybetmekten korkuyor. İnşaatın gelecek yılın sonunda "
        "bitmesi bekleniyor.",
    ],
}
ENGLISH = [
    "The committee met on Tuesday evening to discuss the new bridge. Nobody could agree on the "
    "colour, the width, or the name, and so the meeting was adjourned until after the harvest. "
    "Mrs. Hale, who had come only for the cake, proposed that they ask the ferryman.",
    "If you want to keep bees, begin with a single hive and a good book. Wear light clothes, move "
    "slowly, and never open the hive on a cold or windy day. In your first year you should leave "
    "all of the honey to the colony, for it will need every drop of it during the winter.",
    "Shares fell sharply on Monday after the bank warned that profits would be lower than expected "
    "this year. Analysts said that rising costs and weaker demand for loans were to blame, while "
    "the chief executive insisted that the long-term strategy had not changed.",
    "thx for letting me know!! i'll be about 10 mins late cos the bus didn't turn up again, can u "
    "save me a seat near the back? also mum says hi & wants her casserole dish back lol. see you "
    "soon, don't start without me, i mean it, last time i missed the whole first half",
]


def windows(passage):
    """Passages of 200 characters or more, each beginning with another sentence."""
    sentences = re.findall(r"[^.!?]+[.!?]+", passage)
    for first in range(len(sentences)):
        window = ""
        for sentence in sentences[first:] + sentences[:first]:
            window += sentence
            if len(window.strip()) >= 200:
                yield window.strip()
                break


def english_passages():
    yield from ENGLISH
    for story in STORIES:
        yield from windows(story.replace("\n", " "))


def test_the_language_filter_keeps_english_and_drops_ten_other_languages():
    cleaner = Cleaner(CleanParams(languages=("en",)))
    english = list(english_passages())
    kept = [cleaner(text).removed is None for text in english]
    assert len(english) >= 400
    assert sum(kept) >= 0.99 * len(english)
    assert len(OTHER_LANGUAGES) == 10
    for language, passages in OTHER_LANGUAGES.items():
        foreign = [window for passage in passages for window in windows(passage)]
        dropped = [cleaner(text).removed == "languages" for text in foreign]
        assert len(foreign) >= 10
        assert sum(dropped) >= 0.95 * len(foreign), language


def test_the_language_filter_keeps_every_language_asked_for():
    cleaner = Cleaner(CleanParams(languages=tuple(OTHER_LANGUAGES)))
    for passages in OTHER_LANGUAGES.values():
        assert all(cleaner(text).removed is None for text in passages)
    assert cleaner(ENGLISH[0]).removed == "languages"


def test_a_long_document_is_judged_by_all_of_it():
    """A foreign preface does not condemn a book."""
    german = "\n\n".join(OTHER_LANGUAGES["de"] * 4)  # more than one excerpt
    book = german + "\n\n" + "\n\n".join(STORIES)
    assert clean(book, languages=["en"]).removed is None
    assert clean(book, languages=["de"]).removed == "languages"


def test_a_text_too_short_to_be_judged_is_kept():
    text = OTHER_LANGUAGES["fr"][0][:99]
    assert clean(text, languages=["en"]).removed is None
    assert clean(text, languages=["en"], language_min_chars=99).removed == "languages"


def test_the_languages_are_those_of_the_library():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    assert sorted(LANGUAGES) == sorted(LanguageIdentifier.from_model_file(MODEL_FILE).labels)


# --- quality --------------------------------------------------------------------------------------


def words_of(length, n):
    """Different words of so many letters."""
    letters = [*"bdfgklmnprstvz"], [*"aeiou"]
    made = product(*(letters[place % 2] for place in range(length)))
    return ["".join(next(made)) for _ in range(n)]


def lines_of(words, per_line, end="."):
    """Lines of so many words."""
    cut = [words[at : at + per_line] for at in range(0, len(words), per_line)]
    return [" ".join(line) + end for line in cut]


STOPS = ["the", "of"]


def with_runs(run_words, runs, times, share):
    """A line in which `runs` runs of words each stand `times` times among words met once.

    `share` is that of the words of the runs, all but their first times unless there is only one.
    """
    counted = run_words * (times if runs == 1 else runs * (times - 1))
    words = words_of(5, 3000)
    blocks = [words[at : at + run_words] for at in range(0, runs * run_words, run_words)] * times
    filler = iter(words[runs * run_words :])
    n_filler = int(counted / share) - sum(map(len, blocks))
    text = []
    for block in blocks:
        text += block + [next(filler) for _ in range(n_filler // len(blocks))]
    return " ".join(STOPS + text) + "."


REPEATED = [(5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1)]
TOP = [(2, 0.2), (3, 0.18), (4, 0.16)]
LONG_LINES = lines_of(STOPS + words_of(5, 240), 11)
RULES = [
    ("number of words", " ".join(STOPS + words_of(5, 40)) + ".", {}),
    ("number of words", "\n".join(LONG_LINES), {"max_words": 200}),
    ("mean word length", " ".join(STOPS + words_of(11, 90)) + ".", {}),
    ("mean word length", " ".join(["to", "of", *words_of(2, 60)]) + ".", {}),
    ("symbols", " #".join(STOPS + words_of(5, 60)) + ".", {}),
    ("symbols", "... ".join(STOPS + words_of(5, 60)) + ".", {}),
    ("symbols", "… ".join(STOPS + words_of(5, 60)) + ".", {}),
    ("bullet lines", "\n".join(f"• {line}" for line in LONG_LINES), {}),
    ("bullet lines", "\n".join(f"  -{line}" for line in LONG_LINES), {}),
    ("ellipsis lines", "\n".join(lines_of(STOPS + words_of(5, 240), 11, "...")), {}),
    ("ellipsis lines", "\n".join(lines_of(STOPS + words_of(5, 240), 11, "…")), {}),
    (
        "alphabetic words",
        " ".join([*STOPS, *words_of(5, 60), *map(str, range(100, 120))]) + ".",
        {},
    ),
    ("stop words", " ".join(["the", "The", *words_of(5, 60)]) + ".", {}),
    ("punctuated lines", "\n".join(lines_of(STOPS + words_of(5, 240), 11, ",")), {}),
    ("short lines", "\n".join(lines_of(STOPS + words_of(5, 60), 4)), {}),
    ("repeated lines", "\nYes.\n".join(LONG_LINES), {}),
    (
        "repeated line characters",
        "\n".join(
            lines_of(long := words_of(14, 24), 4)
            + lines_of(STOPS + words_of(5, 82), 6)
            + lines_of(long, 4)[::-1][1:]
            + lines_of(long, 4)[-1:]
        ),
        {},
    ),
    (
        "repeated paragraphs",
        "\n\nYes.\n\n".join("\n".join(LONG_LINES[at : at + 4]) for at in range(0, 20, 4)),
        {},
    ),
    (
        "repeated paragraph characters",
        "\n\n".join([*LONG_LINES[:8], *LONG_LINES[:3]]),
        {"repeated_line_characters": 1, "repeated_ngrams": []},
    ),
    *((f"top {n}-gram", with_runs(n, 1, 12, share + 0.01), {}) for n, share in TOP),
    *((f"repeated {n}-grams", with_runs(n, 10, 2, share + 0.005), {}) for n, share in REPEATED),
]


@pytest.mark.parametrize(("rule", "text", "bounds"), RULES)
def test_every_rule_of_quality_is_broken_by_a_text_that_keeps_all_others(rule, text, bounds):
    quality = replace(Quality(), **bounds)
    assert list(broken_rules(text, quality)) == [rule]
    removed = clean(text, quality=quality)
    assert (removed.text, removed.removed) == ("", f"quality: {rule}")


def test_stories_break_no_rule():
    for story in STORIES:
        assert list(broken_rules(story, Quality())) == []


def test_a_bound_of_0_or_1_turns_a_rule_off():
    off = Quality(
        min_words=0,
        min_word_length=0,
        max_word_length=1000,
        symbols=1000,
        bullet_lines=1,
        ellipsis_lines=1,
        alphabetic_words=0,
        min_stop_words=0,
        punctuated_lines=0,
        short_lines=1,
        repeated_lines=1,
        repeated_paragraphs=1,
        repeated_line_characters=1,
        repeated_paragraph_characters=1,
        top_ngrams=(),
        repeated_ngrams=(),
    )
    for text in ["", "#", "- a...\n\n- a...", "x" * 500, "buy " * 500]:
        assert list(broken_rules(text, off)) == []


def test_overlapping_repetitions_are_counted_once():
    text = "the sea of salt and wind " * 40
    rules = list(broken_rules(text, Quality()))
    assert "repeated 5-grams" in rules
    assert "repeated 5-grams" not in broken_rules(text, Quality(repeated_ngrams=(1.0,)))
