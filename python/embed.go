// Package python carries the curvefs module for Python, so that the binary can
// hand it out.
package python

import _ "embed" // for the module

// Curvefs is the text of curvefs.py.
//
//go:embed curvefs.py
var Curvefs string
