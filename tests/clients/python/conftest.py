"""Puts e2e_base.py where the client's own tests look for it."""

import importlib
import sys
import types

package = types.ModuleType("kubernetes.e2e_test")
package.__path__ = []
sys.modules["kubernetes.e2e_test"] = package
package.base = importlib.import_module("e2e_base")
sys.modules["kubernetes.e2e_test.base"] = package.base
