"""What captions of no use look like, as RE2 patterns. All of them are ours: the paper gives none.

They are matched without regard to case. Every entry is meant to be unambiguous: a caption that
merely speaks of a menu or of a computer must survive.
"""

from __future__ import annotations

WIDE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}"
"""Scripts whose characters say about as much as two letters do."""

CUT_OFF = (
    r"(\.\.\.|…)\s*$",
    r"[,;:&(\[{/\\+=<-]\s*$",
    # Words that end no caption, of languages in which they mean nothing else at the end.
    r"\b(the|of|and|with|for|from|und|der|della|delle|dans|avec|para)\s*$",
)

GIBBERISH = (
    r"[bcdfghjklmnpqrstvwxz]{9,}",  # German knows eight, as in "Angstschweiss"
    r"\b[0-9a-f]*([0-9][a-f]|[a-f][0-9])[0-9a-f]{10,}\b",  # digests and identifiers
    r"[^\s" + WIDE + r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]{45,}",  # a word without an end
    r"(\p{Latin}[0-9]){5,}",
    r"\x{FFFD}|Ã[\x{80}-\x{BF}]|â€|ï¿½",  # decoded with another character set
)

BOILERPLATE = (
    # Messages.
    r"\b(404|403|500)\b.{0,3}\b(error|not found|forbidden)",
    r"\b(page|file|site|image|photo|video|content) (is |was |could )?"
    r"(not (be )?(found|available)|unavailable|removed|missing)\b",
    r"\b(access|permission) denied\b|\b(internal server|database) error\b",
    r"\b(enable|requires?) (javascript|cookies)\b|\bjavascript (is )?(disabled|required)\b",
    r"\byour browser (does not|doesn't) support\b|\bplease (wait|try again|log ?in|sign in)\b",
    # Menus, buttons and footers.
    r"\bclick (here|(on )?(the )?(image|photo|picture|thumbnail)|to (enlarge|zoom|view|see))\b",
    r"\b(add to (cart|basket|wishlist|bag)|buy now|shop now|sign up now|subscribe (now|to our))\b",
    r"\b(privacy policy|terms (of (use|service)|and conditions)|all rights reserved)\b",
    r"\b(skip to (main )?content|back to top|read more|learn more|view larger)\s*[»>.…]*\s*$",
    r"^\s*(home|menu)\s*[|/»>]|([|»›•][^|»›•]{1,25}){4,}",
    r"\b(free|instant) download\b.*\b(pdf|mp3|torrent|full version)\b",
    # The same in other languages.
    r"\b(seite nicht gefunden|in den warenkorb|alle rechte vorbehalten)\b",
    r"\b(hier klicken|zum vergrößern)\b",
    r"\b(page non trouvée|ajouter au panier|tous droits réservés|cliquez (ici|pour))\b",
    r"\b(página no encontrada|añadir al carrito|todos los derechos reservados|haga clic)\b",
    r"\b(pagina non trovata|aggiungi al carrello|tutti i diritti riservati|clicca (qui|per))\b",
    r"\b(página não encontrada|adicionar ao carrinho|todos os direitos reservados|clique aqui)\b",
    r"страница не найдена|добавить в корзину|все права защищены|нажмите (здесь|для)",
    r"页面不存在|页面未找到|加入购物车|版权所有|点击(查看|进入|下载|放大)|请登录|無法找到頁面",
    r"ページが見つかりません|カートに入れる|無断転載|クリック(して|すると)|ログインしてください",
    r"페이지를 찾을 수 없|장바구니에 담기|무단 ?전재|클릭하(면|세요)",
    r"الصفحة غير موجودة|أضف إلى السلة|جميع الحقوق محفوظة|اضغط هنا|انقر هنا",
)

PLACEHOLDERS = (
    r"\blorem ipsum\b|\bdolor sit amet\b",
    r"^\W*(images?|img|photos?|pictures?|pics?|thumb(nail)?s?|slides?|banner|screenshot|untitled|"
    r"default|placeholder|logo|icon|file|figure|fig|item|product|main|cover|bild|foto|imagen|"
    r"immagine|图片|照片|图像|画像|写真|사진|изображение|фото|картинка|صورة)\W*\d*\W*$",
    r"^\W*(null|none|n/?a|undefined|unknown|untitled|no (title|name|caption|description|image)|"
    r"(image )?coming soon|alt( text)?|caption|title|description|test|"
    r"无标题|无题|タイトルなし)\W*$",
    r"\b(image|caption|description|title|text) (goes )?here\b|\bno image available\b",
    r"^\W*(img|image|dsc[nf]?|pict?|photo|screenshot|p)[\s_-]?\d{3,}\b.{0,8}$",
    r"^\S+\.(jpe?g|png|gif|webp|bmp|svg|tiff?)\s*$",
)

CODE = (
    r"</?(a|b|i|p|br|div|span|img|ul|li|td|tr|table|font|strong|em|script|style|iframe|h[1-6])"
    r"(\s[^>]*)?/?>",
    r"&(nbsp|amp|quot|lt|gt|#\d+);",
    r"\bhttps?:/|\bwww\.\w|\b\w+\.(html?|php|aspx?|jsp)\b",
    r"\bfunction\s*\w*\s*\([^)]*\)|\b(var|let|const)\s+\w+\s*=|\bdocument\.|\bwindow\.|=>\s*\{",
    r"<\?(php|xml)|#include\s*<|\bdef \w+\(.*\):|\bimport \w+;|\bpublic (static|class)\b",
    r"\bselect\b.+\bfrom\b.+\bwhere\b|\{\{.*\}\}|\{[^{}]*:[^{}]*;[^{}]*\}",
    r"\[/?(caption|gallery|url|img|quote|b|i)( [a-z]+=[^\]]*)?/?\]",
    r"\$\{?\w+[}\[]|\w+\(\)\s*;|[;{}]\s*$",
)

OFFENSIVE = (
    r"\b(porn\w*|hentai|xxx|nsfw|milfs?|blow ?jobs?|hand ?jobs?|cum ?shots?|gang ?bangs?|creampie|"
    r"dildos?|masturbat\w+|orgasm\w*|anal sex|oral sex|sex tapes?|bukkake|fuck\w*|motherfuck\w*|"
    r"cunts?|sluts?|whores?|titties|bitch(es)?)\b",
    r"\b(porno\w*|fick(en|t)|schlampen?|putas?|zorras?|follando|salopes?|enculé\w*|puttan[ae]|"
    r"troie|scopare|caralho|foder)\b",
    r"порно\w*|шлюх\w*|色情|成人视频|做爱|裸聊|黄片|無修正|エロ動画|아다|야동|섹스|سكس|اباحي",
)
