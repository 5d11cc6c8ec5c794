"""The words of the drawn world: shapes, colours with their RGB anchors, sizes, places, printed words.

Plain data. Knows nothing about geometry, drawing or questions.
"""

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")

# Every colour has several anchors: shades that people and drawing libraries call so. Drawing adds a small jitter.
COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((255, 0, 0), (220, 20, 40), (200, 30, 30), (230, 50, 50)),
    "green": ((0, 128, 0), (0, 160, 60), (40, 170, 70), (0, 255, 0), (60, 200, 60)),
    "blue": ((0, 0, 255), (30, 60, 220), (40, 90, 230), (20, 40, 170)),
    "yellow": ((255, 255, 0), (250, 220, 30), (240, 230, 60)),
    "orange": ((255, 165, 0), (255, 140, 0), (240, 130, 30)),
    "purple": ((128, 0, 128), (130, 40, 180), (148, 0, 211), (110, 40, 150)),
    "pink": ((255, 192, 203), (255, 105, 180), (250, 150, 190)),
    "cyan": ((0, 255, 255), (0, 200, 220), (60, 220, 230)),
    "black": ((0, 0, 0), (20, 20, 24)),
    "white": ((255, 255, 255), (245, 245, 245)),
}

# Diameter as a share of the geometric mean of the picture's sides. "medium" is drawn but never asked about or named.
SIZES = {"small": (0.13, 0.21), "medium": (0.21, 0.30), "large": (0.30, 0.45)}

# Rows top to bottom, columns left to right.
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)

PRINTED_WORDS = tuple(
    "ACE ACT ADD AGE AID AIM AIR ALL ANT APE ARM ART ASH ASK BAG BAR BAT BED BEE BIG BIRD BLUE BOAT BOOK BOX "
    "BOY BUS BUY CAB CAKE CAP CAR CAT CITY COAT COLD COW CUP CUT DAY DEER DESK DOG DOOR DRY DUCK EAR EAST EAT "
    "EGG END EXIT EYE FACE FAN FAR FISH FIVE FLAG FLY FOX FROG FUN GAME GATE GO GOAT GOLD GUM HAND HAT HELLO "
    "HELP HEN HILL HOME HOT HOUSE ICE INK IRON JAM JAR JET JOB JOY JUMP KEY KID KING KITE LAB LAMP LEAF LEG "
    "LION LOVE LOW MAP MILK MOON MOUSE NEST NET NEW NO NORTH NOSE OAK OFF OIL OLD ON ONE OPEN OWL PAN PARK PEN "
    "PIG PIN PLAY QUEEN QUIZ RAIN RAT RAY RED RING ROAD ROCK RUN SALE SEA SHIP SHOP SIX SKY SNOW SON SOUP STAR "
    "STOP SUN TAXI TEA TEN TOP TOY TREE TWO UP VAN VASE VET WALK WALL WAR WATER WAVE WEB WEST WET WIND WOLF "
    "YAK YES YOU ZERO ZOO".split()
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
