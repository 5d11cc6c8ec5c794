"""Operations in the form that is fastest on a processor. They know nothing about models."""
