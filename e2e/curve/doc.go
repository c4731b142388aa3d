// Package curve_test tests what users of Curve use: the curvefs module on every
// Python of the machine, the command lines, and the snapshot service.
package curve
