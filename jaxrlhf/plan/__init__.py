"""Will a recipe fit these devices, and how long will it take?"""
