"""Operations in the form in which a processor is fastest at them. They know nothing about models."""
